"""The methods of the verb 'pretrain'."""
