"""The methods of the verb 'learn'."""
