"""From images to a trained ImageNet classifier: FFCV files, FFCV loaders, short recipes."""
