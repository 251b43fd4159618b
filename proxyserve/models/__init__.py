"""What is loaded: models, experts and how their vocabularies match. Nothing here runs a model."""
