"""What a run's folder proves to somebody who was not there: signatures of the coordinator and of
every site, and the steps from which ε follows."""
