"""What every chapter shares and no chapter teaches: assets, data, pretrained models, runs, figures."""
