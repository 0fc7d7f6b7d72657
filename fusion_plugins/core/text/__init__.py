"""Texts and chats in tokens: which bytes each token is, and where it ends."""
