"""How good answers are: scores of events, what any model has to beat, and tables to read them in. Knows homes, and no model."""
