"""What a device does beside computing: order, copies, host work, graphs."""
