"""What people look at: plots, HTML pages, the model card, the Modelfile."""
