"""``deitkit convert``: weights of vision transformers from and to other libraries.

``command`` parses and prints, ``plan`` decides what is written, ``write`` writes it in each library's own layout.
"""
