"""Write a run's dossier for an ethics board, a data protection officer and a buyer. Each figure in
the dossier names the field of the run from which it was taken."""
