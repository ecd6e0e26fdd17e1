"""The ServerApp that runs at the coordinator, which never sees a record."""
