"""For notebooks: figures and tables of records and result files, panels, the demo and sweeps. Only panels, demo and bias run a model."""
