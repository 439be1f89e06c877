"""What a model family is made of: an architecture read from config.json, and a table of its weights on both sides.

What one family has and another has not is data, in the room `tables`.
"""
