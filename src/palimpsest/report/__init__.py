"""Evidence for people and for third parties: the page, the comparison, the model card, the certificate."""
