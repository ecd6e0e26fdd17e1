"""Choose, read and verify run folders, and admit a run as a teacher."""
