"""From files of records to packed rows of tokens on disk, and back to the rows that training reads.

Reading a finished data set (`tokenized`, `row_order`) needs numpy only.
"""
