"""Texts and chats as tokens: the bytes of each token, and the byte of the text at which it ends.

Reading order: ``types`` (what a tokenized text is), ``token_table`` (the bytes and roles of a vocabulary), ``tokenize``
(a text or chat -> tokens and ends; ``chat`` and ``token_ends`` do the two hard parts). ``content_id`` names texts,
``surfaces`` reads lists of printed tokens where there is no tokenizer, ``tokenizer_json`` reads the file behind one.
``token_bytes`` and ``token_index`` are a vocabulary as arrays, and what looks strings up in it.
"""
