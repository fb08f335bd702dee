"""Language models: what they find likely, what they write, and the prompts for either."""
