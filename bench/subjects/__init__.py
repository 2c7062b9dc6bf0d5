"""What is measured or compared with: null filesystems, other stores, guests and their loads."""
