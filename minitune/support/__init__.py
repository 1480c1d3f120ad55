"""What every program of this kind needs: options, runs on disk, devices, tables, pictures."""
