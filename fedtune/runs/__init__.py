"""Run folders: choose, read and verify one, and admit a run as a teacher."""
