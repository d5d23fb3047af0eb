"""What is kept of a run, and how it is told from every other.

artefacts    files and their records; using again only what fits
files        writing as a whole, one writer at a time       documents  JSON that tells whether it was changed
identity     what a run is made from, by content             source     a function's code, as its syntax tree
checkpoint   an unfinished training                          fetch      published files, by https
"""
