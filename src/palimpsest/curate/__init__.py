"""The methods of the verb 'curate'."""
