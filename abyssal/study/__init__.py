"""The papers' claims as commands: each study ends in a table, a picture and JSON, and says what it does not show.

A study is a function that returns a `Result`; `verbs.py` has its words.
"""
