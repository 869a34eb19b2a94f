"""Transfer learning as a service: labelled images in, a sealed and verified model out."""
