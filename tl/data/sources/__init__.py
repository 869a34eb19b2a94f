"""Sources: each says what images it has and what they are; `tl.data.reading` does the rest."""
