"""Studies: tables of variants trained on equal budgets, from one file to the page of results."""
