"""Run folders: choosing, reading and verifying one, and admitting a run as a teacher."""
