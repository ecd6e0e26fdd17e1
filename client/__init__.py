"""The client app for Flower (ClientApp), which runs at a site."""
