"""What a home says: recordings of sensor events, windows, splits, prompts and answers. Standard library only.

dataset   READER:PATH -> homes, recordings, windows        prompt    a window -> the messages that a model sees
events    Event, Home, Recording, Window                   answer    what a model wrote -> one label per event
windows   runs of ten events                               readers   one file per dataset's format
splits    train, validation and test by group              options   the flags of every door that reads data
"""
