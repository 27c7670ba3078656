"""The methods of the verb 'audit'."""
