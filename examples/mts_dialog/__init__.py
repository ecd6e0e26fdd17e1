"""Doctor–patient dialogues sorted into the twenty sections of a note; five sites."""
