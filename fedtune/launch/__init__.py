"""Start the client, the server and Flower, on one machine or on many."""
