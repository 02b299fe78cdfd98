"""For notebooks and the README: figures and tables made from records that the core and the bench leave behind. No model is run here."""
