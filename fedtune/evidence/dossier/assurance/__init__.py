"""Build a dossier's assurance pack. Its page, assurance.html, answers the questions of a hospital's
governance office, statement by statement. The text of each section of this page is a file
(sections/*.toml). Two more files describe the run for OpenDP's registry and as an RO-Crate."""
