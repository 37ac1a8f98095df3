"""What training did: measures, a recorder of them, figures, and tables of results."""
