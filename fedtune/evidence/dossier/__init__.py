"""A run's dossier: what an ethics board, a data protection officer and a buyer read, each figure
with the field of the run that it is from."""
