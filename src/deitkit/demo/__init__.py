"""A page on this machine where one tries trained models on images of one's own. Needs the extra ``deitkit[demo]``."""
