"""Answer the questions of a hospital's governance office, statement by statement: assurance.html,
and the same run in the formats of two registries. A section is a file (sections/*.toml)."""
