resource "azurerm_user_assigned_identity" "cluster" {
  name                = "${var.name}-cluster"
  resource_group_name = azurerm_resource_group.main.name
  location            = azurerm_resource_group.main.location
}

resource "azurerm_role_assignment" "cluster_network" {
  scope                = azurerm_subnet.nodes.id
  role_definition_name = "Network Contributor"
  principal_id         = azurerm_user_assigned_identity.cluster.principal_id
}

resource "azurerm_kubernetes_cluster" "main" {
  name                      = var.name
  resource_group_name       = azurerm_resource_group.main.name
  location                  = azurerm_resource_group.main.location
  dns_prefix                = var.name
  private_cluster_enabled   = length(var.api_from) == 0
  local_account_disabled    = true
  oidc_issuer_enabled       = true
  workload_identity_enabled = true
  automatic_upgrade_channel = "patch"
  node_os_upgrade_channel   = "NodeImage"

  default_node_pool {
    name                        = "main"
    vm_size                     = var.nodes.size
    auto_scaling_enabled        = true
    min_count                   = var.nodes.min
    max_count                   = var.nodes.max
    vnet_subnet_id              = azurerm_subnet.nodes.id
    zones                       = ["1", "2", "3"]
    temporary_name_for_rotation = "spare"
  }
  identity {
    type         = "UserAssigned"
    identity_ids = [azurerm_user_assigned_identity.cluster.id]
  }
  network_profile {
    network_plugin      = "azure"
    network_plugin_mode = "overlay"
    network_data_plane  = "cilium"
    network_policy      = "cilium" # heeds NetworkPolicies
    service_cidr        = "10.28.0.0/20"
    dns_service_ip      = "10.28.0.10"
    pod_cidr            = "10.24.0.0/14"
  }
  web_app_routing {
    dns_zone_ids = []
  }
  azure_active_directory_role_based_access_control {
    azure_rbac_enabled     = true
    admin_group_object_ids = var.admins
  }
  dynamic "api_server_access_profile" {
    for_each = length(var.api_from) > 0 ? [1] : []
    content {
      authorized_ip_ranges = var.api_from
    }
  }
  depends_on = [azurerm_role_assignment.cluster_network]
}

resource "azurerm_kubernetes_cluster_node_pool" "gpu" {
  count                 = var.gpu_nodes.max > 0 ? 1 : 0
  name                  = "gpu"
  kubernetes_cluster_id = azurerm_kubernetes_cluster.main.id
  vm_size               = var.gpu_nodes.size
  auto_scaling_enabled  = true
  min_count             = 0
  max_count             = var.gpu_nodes.max
  vnet_subnet_id        = azurerm_subnet.nodes.id
  node_taints           = ["nvidia.com/gpu=present:NoSchedule"]
}
