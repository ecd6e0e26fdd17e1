"""Build a dossier's assurance pack. assurance.html answers the questions of a hospital's governance
office, statement by statement; each of its sections is a file (sections/*.toml). Two more files
describe the run for OpenDP's registry and as an RO-Crate."""
