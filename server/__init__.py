"""The coordinator: admits sites, runs rounds, keeps a checkpoint. It never sees a record."""
