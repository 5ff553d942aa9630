"""What people look at: plots, the summary of all SAEs, and the page that holds both.

Everything here reads evaluations and training histories, the JSON files, and imports no torch.
"""
