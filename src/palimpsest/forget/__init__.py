"""The methods of the verb 'forget'."""
