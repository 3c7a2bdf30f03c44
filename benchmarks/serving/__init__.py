"""What the benchmark of the gateway runs beside it, each as a process of its own, and how it is put under load."""
