"""Several processes train one model: who they are, what they decide, how the model is wrapped."""
