"""Memory and time of a job on a cluster, before it is submitted."""
