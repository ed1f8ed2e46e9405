"""Where the cluster's wishes live: typed resources and the stores that keep them."""
