"""The ServerApp that runs at the coordinator. It never sees a record."""
