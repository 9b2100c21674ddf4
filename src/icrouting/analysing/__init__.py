"""What a router does and why: the paper's analyses, and those that its readers asked for."""
