"""Tasks: labelled rows and the prompts made of them."""
