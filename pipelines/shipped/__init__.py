"""What a wheel holds beside the code: configurations, prompts and examples, and the commands that bring them to a user.

`configs`, `data` and `examples` are links to the folders of a checkout, and folders of an installed package.
"""
