"""Commands of `blnet` that are no folder's own, and what the commands of several folders share.

- convert, export, optimize, doctor: one command each;
- sources: what SOURCE names, and sizes and numbers of classes in words;
- device: where a trained network runs;
- answers: what `blnet predict` says of files;
- confusion: which classes `blnet evaluate` saw taken for which;
- tables: what both tables of `blnet table` share.
"""
