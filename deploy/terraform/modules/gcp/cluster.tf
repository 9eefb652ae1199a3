resource "google_service_account" "node" {
  project      = var.project
  account_id   = "${var.name}-node"
  display_name = "${var.name}: nodes of the cluster"
  depends_on   = [google_project_service.needed]
}

resource "google_project_iam_member" "node" {
  for_each = toset(["roles/container.defaultNodeServiceAccount"])
  project  = var.project
  role     = each.value
  member   = google_service_account.node.member
}

resource "google_container_cluster" "main" {
  project                  = var.project
  location                 = var.region
  name                     = var.name
  network                  = google_compute_network.main.id
  subnetwork               = google_compute_subnetwork.main.id
  remove_default_node_pool = true
  initial_node_count       = 1
  deletion_protection      = var.protected
  datapath_provider        = "ADVANCED_DATAPATH" # heeds NetworkPolicies

  release_channel {
    channel = "REGULAR"
  }
  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }
  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }
  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = length(var.api_from) == 0
    master_ipv4_cidr_block  = "172.16.0.0/28"
  }
  master_authorized_networks_config {
    dynamic "cidr_blocks" {
      for_each = var.api_from
      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }
  # The first pool, removed at once, is made with these.
  node_config {
    service_account = google_service_account.node.email
    shielded_instance_config {
      enable_secure_boot = true
    }
  }
  lifecycle {
    ignore_changes = [node_config]
  }
}

resource "google_container_node_pool" "main" {
  project            = var.project
  location           = var.region
  name               = "main"
  cluster            = google_container_cluster.main.name
  initial_node_count = var.nodes.min
  autoscaling {
    min_node_count = var.nodes.min
    max_node_count = var.nodes.max
  }
  node_config {
    machine_type    = var.nodes.type
    service_account = google_service_account.node.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    workload_metadata_config {
      mode = "GKE_METADATA"
    }
    shielded_instance_config {
      enable_secure_boot = true
    }
  }
}

resource "google_container_node_pool" "gpu" {
  count              = var.gpu_nodes.max > 0 ? 1 : 0
  project            = var.project
  location           = var.region
  name               = "gpu"
  cluster            = google_container_cluster.main.name
  initial_node_count = 0
  autoscaling {
    total_min_node_count = 0
    total_max_node_count = var.gpu_nodes.max
    location_policy      = "ANY"
  }
  node_config {
    machine_type    = var.gpu_nodes.type
    service_account = google_service_account.node.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    guest_accelerator {
      type  = var.gpu_nodes.accelerator
      count = 1
      gpu_driver_installation_config {
        gpu_driver_version = "DEFAULT"
      }
    }
    taint {
      key    = "nvidia.com/gpu"
      value  = "present"
      effect = "NO_SCHEDULE"
    }
    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }
}
